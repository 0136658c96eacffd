"""How each library makes a `Task`: as its own documentation shows it, and nothing more."""
