"""What only CUDA has: kernels in Triton, and steps replayed as graphs."""
