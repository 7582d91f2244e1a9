# The same in a shell, whose children come and go.
n=0 value=1
while :; do
    if [ $n != 0 ] && [ "$(cat /srv/chain0)" != "$n $value" ]; then echo "at $n, file at $(cat /srv/chain0)"; exit 3; fi
    n=$((n + 1)) value=$((value * 48271 % 2147483647))
    echo "$n $value" > /srv/chain0.new
    mv /srv/chain0.new /srv/chain0
done
