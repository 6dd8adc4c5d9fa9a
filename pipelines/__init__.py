"""What runs when: the KFP graphs and their schedule."""
