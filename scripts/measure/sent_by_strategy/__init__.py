"""What every strategy sends: by formula, counted, in its textbook form, with windows, on grids."""
