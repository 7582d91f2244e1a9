// sends PID N: queues SIGRTMIN N times, none left out.
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
int main(int n, char **args) {
    if (n != 3) return 2;
    int pid = atoi(args[1]);
    for (int left = atoi(args[2]); left > 0; left--)
        while (sigqueue(pid, SIGRTMIN, (union sigval){.sival_int = left})) { if (errno != EAGAIN) return 1; sched_yield(); }
    return 0;
}
