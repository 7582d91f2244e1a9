# A program is built again and again, and must come out the same.
mkdir -p /srv/build && cd /srv/build || exit 3
said=/srv/said.0 lap=0
fail() { echo "at lap $lap: $*"; exit 3; }
echo 'int f0(int);' > common.h
for k in 0 1 2 3 4 5 6 7; do
    after="f$((k + 1))(x)"
    [ $k = 7 ] && after=x
    printf '#include <stdio.h>\n#include <stdlib.h>\n#include "common.h"\nint f%d(int);\nint f%d(int x) {\n' $((k + 1)) $k > s$k.c
    for j in 2 3 4 5 6 7 8; do echo "    if (x % $j == 0) x += $((k * j % 97));" >> s$k.c; done
    echo "    return $after + $k; }" >> s$k.c
done
printf '#include <stdio.h>\n#include "common.h"\nint main(void) { printf("%%d\\n", f0(3)); return 0; }\n' > main.c
printf 'OBJECTS := $(patsubst %%.c,%%.o,$(wildcard *.c))\nprogram: $(OBJECTS)\n\tcc -o $@ $(sort $^)\n%%.o: %%.c\n\tcc -O1 -MMD -c -o $@ $<\n-include $(wildcard *.d)\n' > Makefile
while :; do
    [ $lap = 0 ] || [ "$(tail -n 1 $said)" = "$line" ] || fail "is $line, its file $(tail -n 1 $said)"
    rm -f -- *.o *.d program
    make -s -j3 > /srv/told 2>&1 || fail "make: $? $(cat /srv/told)"
    [ ! -s /srv/told ] || fail "make says $(cat /srv/told)"
    result=$(./program) || fail "program: $?"
    objects=$(cat -- *.o program | sha256sum | cut -c 1-16)
    make -s -j3 > /srv/told 2>&1 || fail "make again: $? $(cat /srv/told)"
    [ "$(cat -- *.o program | sha256sum | cut -c 1-16)" = "$objects" ] || fail "made again what was there"
    lap=$((lap + 1))
    line="$lap $(date +%s%3N) $result $objects"
    [ $((lap % 1000)) != 0 ] || mv $said $said.old
    echo "$line" >> $said
done
