// A loop that holds known values in all registers and dies at a difference. Ends with "ok" after one byte of input.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

volatile int over;
__attribute__((aligned(32))) const unsigned long pattern[4] = {0x1111222233334444, 0x5555666677778888, 0x9999aaaabbbbcccc, 0xddddeeeeffff0000};

__attribute__((noreturn, used)) void differs(void) { static const char text[] = "bad: a register changed\n"; (void)!write(1, text, sizeof text - 1); _exit(1); }

#define SET(reg, value) "mov $" value ", %%" reg "\n"
#define SAME(reg, value) "cmp $" value ", %%" reg "\n jne 9f\n"
#define VECTORS(op) op("0") op("1") op("2") op("3") op("4") op("5") op("6") op("7") op("8") op("9") op("10") op("11") op("12") op("13") op("14")
#define LOAD(n) "vmovdqa pattern(%%rip), %%ymm" n "\n"
#define CHECK(n) "vpxor pattern(%%rip), %%ymm" n ", %%ymm15\n vptest %%ymm15, %%ymm15\n jnz 9f\n"
#define ALL(op) op("rax", "0x11") op("rbx", "0x22") op("rcx", "0x33") op("rdx", "0x44") op("rsi", "0x55") op("rdi", "0x66") \
    op("r8", "0x88") op("r9", "0x99") op("r10", "0xaa") op("r11", "0xbb") op("r12", "0xcc") op("r13", "0xdd") op("r14", "0xee") op("r15", "0xff")

static void spin(void) {
    __asm__ volatile(
        ALL(SET) VECTORS(LOAD)
        "1:\n" ALL(SAME) VECTORS(CHECK)
        "stc\n nop\n nop\n nop\n nop\n jnc 9f\n"
        "movq $0x77, -8(%%rsp)\n nop\n nop\n cmpq $0x77, -8(%%rsp)\n jne 9f\n"  // the red zone
        "cmpl $0, over(%%rip)\n je 1b\n jmp 8f\n"
        "9: and $-16, %%rsp\n call differs\n"
        "8:\n" : : : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
        "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}
static void *wait_for_end(void *nothing) { char byte; (void)!read(0, &byte, 1); over = 1; return nothing; }

int main(void) {
    char byte;
    pthread_t thread;
    if (read(0, &byte, 1) != 1) return 2;
    pthread_create(&thread, NULL, wait_for_end, NULL);
    printf("ready\n"); fflush(stdout);
    spin();
    printf("ok\n");
    return 0;
}
