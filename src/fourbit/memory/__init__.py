"""What a training run will hold in memory, told before anything is allocated; see `plan`."""
