"""What a benchmark prints at its end."""


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, ours, naive="", ratio="", target="", good=None):
        self.rows.append((what, ours, naive, ratio, target, {None: "", True: "ok", False: "MISSED"}[good]))

    def print(self):
        rows = [("", "ours", "naive", "ours beside it", "target", ""), *self.rows]
        widths = [max(len(row[at]) for row in rows) for at in range(6)]
        for row in rows:
            print("  ".join(cell.ljust(width) if at in (0, 5) else cell.rjust(width)
                            for at, (cell, width) in enumerate(zip(row, widths))).rstrip())
