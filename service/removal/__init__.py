"""Who may remove blobs just now: everybody, but while a dump is being made nobody, so that no blob goes which its snapshot names."""
