"""Is a dataset whole? Finds damaged files and rebuilds what can be rebuilt."""
