"""Networks from elsewhere: built, loaded, and brought into the one form that the rest works with."""
