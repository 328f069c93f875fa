"""The C++ tests, built and run by CMake."""
