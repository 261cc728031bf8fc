"""Every private touch of Flower and of its web server, and nothing else; for flwr 1.41 and 1.42.

version      which Flower this is, and whether its internals are known
task_message a `Message` outside a task, for tests and the engine in this process
simulation   Flower's simulation, called from a program
app_bundle   the app as Flower packs it, and its hash
fleet        whether a node that a SuperLink knows has signed a request
supernode    Flower's SuperNode without its fixed waits
predecessor  a node that was killed is reported by the next one
run_watch    a node asks whether the runs at its site go on
superexec    one ServerApp process a run, however slow the host
executor     one process that forks a ClientApp for each message
clientapp    what runs in the fork
objects      parts of a message that are not there yet are asked for again sooner
journal      how far a task has come, so that a killed fork can be started again
"""
