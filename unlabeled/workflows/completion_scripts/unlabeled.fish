# Completion for unlabeled, written by `unlabeled completion`. A TAB starts no Python: every name is in this file.
# @tables@

# The value that was given to $argv[1] on the command line, else $argv[2].
function __unlabeled_given
    for word in (commandline -opc)
        if string match -q -- "$argv[1]=*" $word
            string replace -- "$argv[1]=" "" $word
            return
        end
    end
    echo $argv[2]
end

# Settings that begin with $argv[2], up to the next dot: `optim.` before `optim.lr=`.
function __unlabeled_complete_key
    set -l word $argv[2]
    set -l keys (__unlabeled_keys $argv[1]) (__unlabeled_task_keys $argv[1] (__unlabeled_given task mae)) \
        (__unlabeled_source_keys $argv[1] (__unlabeled_given data folder))
    for key in $keys
        string match -q -- "$word*" $key; or continue
        set -l rest (string sub -s (math (string length -- "$word") + 1) -- $key)
        if string match -q -- "*.*" $rest
            echo $word(string split -m 1 -- . $rest)[1].
        else
            echo $key=
        end
    end | sort -u
end

# Values of the setting $argv[1]; within a list, values of its last entry.
function __unlabeled_complete_value
    set -l before (string match -r -- '^\[(?:.*,)?' $argv[2])
    for value in (__unlabeled_values $argv[1])
        echo "$argv[1]=$before$value"
    end
end

function __unlabeled
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    if test (count $words) -le 1
        printf '%s\n' $__unlabeled_commands --help --version
        return
    end
    set -l command $words[2]
    if string match -q -- "-*" $word
        printf '%s\n' (__unlabeled_options $command) --help
        return
    end
    switch $command
        case settings
            printf '%s\n' $__unlabeled_topics
            return
        case completion
            printf '%s\n' bash zsh fish
            return
    end
    if string match -q -- "*=*" $word
        set -l parts (string split -m 1 -- = $word)
        __unlabeled_complete_value $parts[1] $parts[2]
        return
    end
    if test (count $words) -eq 2; and contains $command evaluate finetune export sizes report
        return # a path, by the shell itself
    end
    __unlabeled_complete_key $command $word
end

# Files are offered only where there are no names, as after `out=`.
complete -c unlabeled -n 'test (count (__unlabeled)) -gt 0' -f
complete -c unlabeled -a '(__unlabeled)'
