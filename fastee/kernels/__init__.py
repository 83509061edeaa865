"""Kernels written in Python dialects, one folder per compiler and one file per op. They know buffers and sizes, nothing of fastee or torch."""
