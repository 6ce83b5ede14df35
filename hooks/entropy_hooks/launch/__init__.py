"""`entropy-monitor run`: how an unmodified script comes to be observed. Importing this package costs nothing."""
