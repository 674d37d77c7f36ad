"""What the learnt features are worth: checks on a frozen backbone that use labels."""
