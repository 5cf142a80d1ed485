"""The settings of a run: its arguments, LOMO's section and DeepSpeed's, checked before anything is built."""
