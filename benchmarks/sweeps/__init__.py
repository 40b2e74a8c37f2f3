"""The sweeps behind the library's default constants."""
