"""The programs that nnslim works inside: the only modules that import or patch them."""
