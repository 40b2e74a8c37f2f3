"""Building memories: an example's way from a data set to rows."""
