"""The front door: the connections of all clients, in one loop; a thread is only for a request that is whole."""
