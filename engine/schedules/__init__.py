"""Pipeline schedules as data: what they are, that they are right, and what they cost.  Pure, and without torch.

`table` is where a schedule is added: configuration, layout rules, command line and executor read it.  `validate` checks
any of them, `lowering` adds the messages between ranks, `simulate` keeps the time.
"""
