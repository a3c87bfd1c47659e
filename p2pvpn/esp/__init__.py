"""ESP in tunnel mode: packets, replay windows, SAs, selectors and the table of them; no input or output.

The worker process of the user plane and the simulation run the same `engine.EspEngine`.
"""
