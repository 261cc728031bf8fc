"""Every private touch of Flower and of its web server, and nothing else; for flwr 1.41 and 1.42.

version      which Flower this is, and whether its internals are known
task_message a `Message` outside a task, for tests and the engine in this process
simulation   Flower's simulation, called from a program
app_bundle   the app as Flower packs it, and its hash
fleet        whether a node that a SuperLink knows has signed a request
superlink    Flower's SuperLink with its application behind another one
listening    the connections of its web server, watched
command_errors why a command of Flower failed, from what it prints
node_log     what Flower's node prints, as far as a site goes by it
supernode    Flower's SuperNode without its fixed waits
predecessor  a node that was killed is reported by the next one
run_watch    a node asks whether the runs at its site go on
superexec    one ServerApp process a run, however slow the host
executor     one process that forks a ClientApp for each message
clientapp    what runs in the fork
objects      parts of a message that are not there yet are asked for again sooner
journal      how far a task has come, so that a killed fork can be started again
"""
