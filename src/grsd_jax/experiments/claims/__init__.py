"""Both networks from several seeds: do the paper's claims reproduce?"""
