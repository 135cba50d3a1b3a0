"""One network: what it is made of, what replaces its layers, what it costs."""
