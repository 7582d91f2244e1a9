// A loop that holds known values in the 512-bit and mask registers. Ends with "ok" after one byte of input.
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

volatile int over;
__attribute__((aligned(64))) const unsigned long pattern[8] = {
    0x1111222233334444, 0x5555666677778888, 0x9999aaaabbbbcccc, 0xddddeeeeffff0000, 0x0123456789abcdef, 0xfedcba9876543210, 0x13579bdf02468ace, 0x1};

#define ALL(op) op("0") op("1") op("2") op("3") op("4") op("5") op("6") op("7") op("8") op("9") op("10") op("11") op("12") op("13") \
    op("14") op("15") op("16") op("17") op("18") op("19") op("20") op("21") op("22") op("23") op("24") op("25") op("26") op("27") \
    op("28") op("29") op("30") op("31")
#define LOAD(n) "vmovdqa64 pattern(%%rip), %%zmm" n "\n"
#define CHECK(n) "vpcmpneqq pattern(%%rip), %%zmm" n ", %%k1\n kmovw %%k1, %%eax\n test %%eax, %%eax\n jnz 9f\n"
#define MASK(k, value) "mov $" value ", %%eax\n kmovw %%eax, %%k" k "\n"
#define SAME(k, value) "kmovw %%k" k ", %%eax\n cmp $" value ", %%eax\n jne 9f\n"
#define MASKS(op) op("2", "0x22") op("3", "0x33") op("4", "0x44") op("5", "0x55") op("6", "0x66") op("7", "0x77")

__attribute__((target("avx512f"))) static int spin(void) {
    int bad = 0;
    __asm__ volatile(ALL(LOAD) MASKS(MASK) "1:\n" ALL(CHECK) MASKS(SAME) "cmpl $0, over(%%rip)\n je 1b\n jmp 8f\n9: mov $1, %0\n8:\n"
        : "+r"(bad) : : "rax", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
        "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7");
    return bad;
}
static void *wait_for_end(void *nothing) { char byte; (void)!read(0, &byte, 1); over = 1; return nothing; }

int main(void) {
    char byte;
    pthread_t thread;
    if (read(0, &byte, 1) != 1) return 2;
    pthread_create(&thread, NULL, wait_for_end, NULL);
    printf("ready\n"); fflush(stdout);
    if (spin()) { printf("bad: a register changed\n"); return 1; }
    printf("ok\n");
    return 0;
}
