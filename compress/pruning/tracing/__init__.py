"""Which channels of a network's parameters are the same channel?"""
