"""C++ and CUDA sources of the optional extension."""
