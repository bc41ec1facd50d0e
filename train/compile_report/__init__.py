"""What a training step needs of machines that are not here; see __main__."""
