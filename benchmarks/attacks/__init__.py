"""What users, clients and peers can do to others, tried on a program of one's own: ``make attack``."""
