"""Models of other libraries on the ops of this package."""
