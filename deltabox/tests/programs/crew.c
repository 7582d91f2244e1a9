// A crew of threads in waits of three kinds. crew N: reads one byte to begin, prints "ready". Then a letter a line: 'm' starts more
// threads, 'e' ends every second one of the first N, 't' has all first ones do a step, 'n' renames them, 'c' says "ok" if the
// first N and no others are there as at the beginning (and has them do a step), 'j' ends and joins them, 'x' exits with 7.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 200 };
static int n_first, n_all, n_steps;
static pthread_t threads[MOST];
static pid_t tids[MOST], first_pid;
static int gates[MOST][2], is_over[MOST];
static volatile int orders[MOST], answers[MOST], n_waiting;
static volatile char order;
static volatile long sums[MOST], locals[MOST];
static const char *volatile wrongs[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, robust;
static pthread_cond_t ordered = PTHREAD_COND_INITIALIZER;
static __thread long mine;
// Without pipes: in a process that has no descriptors yet.
static int n_kinds = 3;
static int kind_of(long k) { return n_kinds == 2 ? k % 2 * 2 : k % 3; }

static void say(const char *word, const char *what) {
    if (what) printf("%s %s: %s\n", word, what, strerror(errno)); else printf("%s\n", word);
    fflush(stdout);
}
static void die(const char *what) { say("bad", what); _exit(1); }
static void *list_of_thread(void) {
    void *head = NULL;
    size_t size;
    return syscall(SYS_get_robust_list, 0, &head, &size) ? NULL : head;
}
static char wait_for(long k, int *seen) {
    char letter;
    if (kind_of(k) == 0) {
        pthread_mutex_lock(&lock);
        n_waiting++;
        while (orders[k] == *seen) pthread_cond_wait(&ordered, &lock);
        n_waiting--;
        letter = order;
        pthread_mutex_unlock(&lock);
    } else if (kind_of(k) == 1) {
        __atomic_add_fetch(&n_waiting, 1, __ATOMIC_SEQ_CST);
        if (read(gates[k][0], &letter, 1) != 1) wrongs[k] = "read";
        __atomic_sub_fetch(&n_waiting, 1, __ATOMIC_SEQ_CST);
    } else {
        __atomic_add_fetch(&n_waiting, 1, __ATOMIC_SEQ_CST);
        while (orders[k] == *seen) {
            struct timespec begin, end, nap = {0, 3000000};
            clock_gettime(CLOCK_MONOTONIC, &begin);
            if (nanosleep(&nap, NULL)) wrongs[k] = "nanosleep";
            clock_gettime(CLOCK_MONOTONIC, &end);
            if ((end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec < 3000000) wrongs[k] = "a short sleep";
        }
        __atomic_sub_fetch(&n_waiting, 1, __ATOMIC_SEQ_CST);
        letter = order;
    }
    (*seen)++;
    return letter;
}
static void *work(void *number) {
    long k = (long)number, local = 5 * k;
    int seen = 0;
    char name[16], now[16];
    void *list = list_of_thread();
    volatile struct rseq *rseq = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    double own = k / 3.0;
    snprintf(name, sizeof name, "crew %ld\\", k);
    prctl(PR_SET_NAME, name);
    tids[k] = gettid();
    mine = 1000 * k;
    if (k == 0) pthread_mutex_lock(&robust);
    while (1) {
        char letter = wait_for(k, &seen);
        if (letter == 'q') return (void *)(k + 1);
        if (letter == 'n') { prctl(PR_SET_NAME, "other"); answers[k] = seen; continue; }
        mine += 1;
        local = local * 31 + mine;
        own = own * 2;
        prctl(PR_GET_NAME, now);
        // As at the beginning, and as the kernel has it.
        if (gettid() != tids[k]) wrongs[k] = "thread number";
        if (strcmp(name, now)) wrongs[k] = "name";
        if (list != list_of_thread() || !list) wrongs[k] = "robust list";
        if (__rseq_size && (rseq->cpu_id > 4096 || (long)syscall(SYS_rseq, rseq, 32, 0, 0x53053053) != -1 || errno != EBUSY)) wrongs[k] = "rseq";
        if (own != k / 3.0 * (1L << seen)) wrongs[k] = "a number in a register";
        sums[k] = mine;
        locals[k] = local;
        answers[k] = seen;
    }
}
static void give(int k, char letter) {
    pthread_mutex_lock(&lock);
    order = letter;
    orders[k]++;
    pthread_cond_broadcast(&ordered);
    pthread_mutex_unlock(&lock);
    if (kind_of(k) == 1 && write(gates[k][1], &letter, 1) != 1) die("write");
}
static void start(int n) {
    for (int i = 0; i < n; i++, n_all++) {
        if (pipe(gates[n_all]) || pthread_create(&threads[n_all], NULL, work, (void *)(long)n_all)) die("start");
    }
    for (int patience = 0; n_waiting < n_all && patience < 5000; patience++) usleep(1000);
    usleep(10000);
}
static const char *finish(int k) {
    void *result;
    give(k, 'q');
    is_over[k] = 1;
    return pthread_join(threads[k], &result) || result != (void *)(long)(k + 1) ? "join" : NULL;
}
static const char *step(char letter) {
    for (int k = 0; k < n_first; k++) if (!is_over[k]) give(k, letter);
    for (int k = 0; k < n_first; k++) {
        for (int patience = 0; !is_over[k] && answers[k] != orders[k]; patience++) {
            if (patience > 5000) return "a thread does not answer";
            usleep(1000);
        }
        if (wrongs[k]) return wrongs[k];
    }
    n_steps++;
    return NULL;
}
static int n_tasks(void) {
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    while (dir && readdir(dir)) n++;
    if (dir) closedir(dir);
    return n - 2;
}
static const char *compare(void) {
    if (getpid() != first_pid || gettid() != first_pid) return "process number";
    if (n_steps || n_all != n_first) return "memory";
    if (n_tasks() != n_first + 1) return "the number of threads";
    const char *wrong = step('t');
    if (wrong) return wrong;
    for (long k = 0; k < n_first; k++)
        if (sums[k] != 1000 * k + 1 || locals[k] != 5 * k * 31 + 1000 * k + 1) return "what a thread had";
    return NULL;
}
static const char *join(void) {
    for (int k = 0; k < n_first; k++) if (!is_over[k] && finish(k)) return "join";
    // Thread 0 ended while it held this: the kernel had its list.
    if (n_first && pthread_mutex_lock(&robust) != EOWNERDEAD) return "a robust mutex";
    if (!n_first) return NULL;
    pthread_mutex_consistent(&robust);
    pthread_mutex_unlock(&robust);
    return NULL;
}

int main(int argc, char **argv) {
    char letter;
    if (read(0, &letter, 1) != 1) return 1;
    if (getenv("INSIDE")) {
        // Of a PID namespace: its init waits, and the crew is its child, number 2.
        if (unshare(CLONE_NEWPID)) die("unshare");
        pid_t init = fork();
        if (init) { waitpid(init, NULL, 0); return 0; }
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fork()) for (;;) { if (wait(NULL) < 0 && errno == ECHILD) pause(); }
    }
    if (getenv("LEADS")) { setsid(); n_kinds = 2; }
    if (getenv("USER_NUMBER")) { int user = atoi(getenv("USER_NUMBER")); if (setresuid(user, user, user)) die("setresuid"); prctl(PR_SET_DUMPABLE, 1); }
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &kind);
    first_pid = getpid();
    n_first = argc > 1 ? atoi(argv[1]) : 4;
    if (getenv("SHARED")) memset(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 1, 8192);
    start(n_first);
    say("ready", NULL);
    if (getenv("NO_LEADER")) { say("ok", NULL); pthread_exit(NULL); }
    while (read(0, &letter, 1) == 1) {
        const char *wrong = NULL;
        if (letter == 'm') start(n_first / 2 + 1);
        else if (letter == 'e') { for (int k = 0; k < n_first; k += 2) if (!is_over[k] && finish(k)) wrong = "join"; }
        else if (letter == 't' || letter == 'n') wrong = step(letter);
        else if (letter == 'c') wrong = compare();
        else if (letter == 'j') wrong = join();
        else if (letter == 'x') _exit(7);
        else break;
        if (wrong) say("bad", wrong); else say("ok", NULL);
    }
    return 0;
}
