"""The one error that a user causes and can mend."""


class UserError(Exception):
    """Bad input: one clear line (the file or field, its value, what to do) and exit code 2.

    Anything else that is raised is a fault of ours, or of the machine, and keeps its traceback.
    """
