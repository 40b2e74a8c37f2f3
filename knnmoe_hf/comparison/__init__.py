"""Many methods on the same items of the same tasks: running them, and telling what came out."""
