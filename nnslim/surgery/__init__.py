"""Walking a network once, replacing its layers, and patching attributes that can be put back."""
