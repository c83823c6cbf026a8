"""Networks of users and libraries: built, loaded, and converted to the form that all stages use."""
