// Per-CPU counters incremented in restartable sequences by several threads; "ok" if none was lost at the end.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/rseq.h>
#include <unistd.h>

#define N 4
struct counter { long value; char pad[56]; } counters[256];
volatile int over;
static long totals[N];

static int add(struct rseq *r) {
    int failed = 0;
    __asm__ goto(
        ".pushsection __rseq_cs, \"aw\"\n .balign 32\n 3: .long 0, 0\n .quad 1f, (2f - 1f), 4f\n .popsection\n"
        "lea 3b(%%rip), %%rax\n mov %%rax, 8(%[r])\n"
        "1: mov (%[r]), %%eax\n"  // cpu_id_start
        "shl $6, %%rax\n lea counters(%%rip), %%rcx\n add %%rax, %%rcx\n mov (%%rcx), %%rdx\n"
        "mov $20, %%eax\n 5: dec %%eax\n jnz 5b\n"  // stay inside for a while
        "inc %%rdx\n mov %%rdx, (%%rcx)\n"
        "2:\n"
        ".pushsection __rseq_failure, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n 4: jmp %l[abort]\n .popsection\n"
        : : [r] "r"(r) : "rax", "rcx", "rdx", "memory", "cc" : abort);
    return 1;
abort:
    return failed;
}
static void *work(void *index) {
    struct rseq *r = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    long n = 0;
    while (!over) n += add(r);
    totals[(long)index] = n;
    return NULL;
}
int main(void) {
    char byte;
    pthread_t threads[N];
    if (read(0, &byte, 1) != 1) return 2;
    if (!__rseq_size) { printf("bad: no rseq\n"); return 1; }
    for (long i = 1; i < N; i++) pthread_create(&threads[i], NULL, work, (void *)i);
    extern void *wait_for_end(void *);
    pthread_create(&threads[0], NULL, wait_for_end, NULL);
    printf("ready\n"); fflush(stdout);
    work((void *)0);
    long expected = totals[0], found = 0;
    for (int i = 1; i < N; i++) { pthread_join(threads[i], NULL); expected += totals[i]; }
    for (int i = 0; i < 256; i++) found += counters[i].value;
    if (found == expected) printf("ok\n"); else printf("bad: %ld of %ld counted\n", found, expected);
    return 0;
}
void *wait_for_end(void *nothing) { char byte; (void)!read(0, &byte, 1); over = 1; return nothing; }
