"""Where rooms are composed: the server, the loop, evaluations, the Hub."""
