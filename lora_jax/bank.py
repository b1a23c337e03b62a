class Bank:
    pass
