"""How the embedded base is made: practice windows, their statistics, a reader, an optimizer."""
