"""A stand-in for the original package: its names and call signatures, modules from plain transformers."""

print("the original says a line when it is imported")
