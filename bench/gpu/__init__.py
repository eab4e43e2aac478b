"""What `bench.on_gpu` runs: checks and measurements on a GPU, in groups that are kept one by one."""
