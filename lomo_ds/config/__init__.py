"""The settings of a run: its arguments, the optimizer's section and DeepSpeed's, checked before anything is built."""
