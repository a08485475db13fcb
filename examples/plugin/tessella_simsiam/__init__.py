"""SimSiam for Tessella: an example of a package that adds to Tessella without changing it."""
