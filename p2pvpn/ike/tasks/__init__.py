"""One module per exchange: how its request is built, how it is answered, and what the answer means."""
