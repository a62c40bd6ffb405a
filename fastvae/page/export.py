"""stub"""


def export_page(): ...
