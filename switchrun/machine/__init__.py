"""This machine: its GPUs, memory, processor, disks, and the folders that switchrun writes to. No torch."""
