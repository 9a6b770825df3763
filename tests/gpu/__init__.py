"""What only a card can tell."""
