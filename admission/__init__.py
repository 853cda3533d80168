"""Who may send requests, how many, and whose turn is next."""
