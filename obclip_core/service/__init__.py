"""The wire: how an offer travels up and a hand-over comes back."""
