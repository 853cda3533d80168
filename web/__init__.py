"""Everything else that speaks HTTP: pages, status, documents, and what the doors share."""
